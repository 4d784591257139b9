# SPDX-License-Identifier: Apache-2.0
"""The kernels on GPU."""
