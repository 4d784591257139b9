# SPDX-License-Identifier: Apache-2.0
"""What an optimizer is made of: stages as data, their formulas, and the program of a leaf."""
