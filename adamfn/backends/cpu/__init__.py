# SPDX-License-Identifier: Apache-2.0
"""The native code on CPU: its C++, the loader of the library, and the lowering of calls to it."""
