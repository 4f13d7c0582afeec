# SPDX-License-Identifier: Apache-2.0
"""Published methods, one file each, in a dict written out by hand."""

from lvjax.methods.error_free import ErrorFree, error_free

METHODS = {"error_free": error_free}

__all__ = ["METHODS", "ErrorFree", "error_free"]
