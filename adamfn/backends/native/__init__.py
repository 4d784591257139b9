"""Native code of the step on CPU: its C++, and the loader of the library built from it."""
