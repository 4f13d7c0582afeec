# SPDX-License-Identifier: Apache-2.0
"""Long video from the Wan family in pure-functional JAX."""
