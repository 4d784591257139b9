# SPDX-License-Identifier: Apache-2.0
"""What a program costs on an accelerator that is not at hand, by the accelerator's own compiler."""
