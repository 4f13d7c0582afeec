# SPDX-License-Identifier: Apache-2.0
"""Published methods, one file each, in a dict written out by hand."""

from lvjax.methods.error_free import ErrorFree, error_free
from lvjax.methods.wan import WanSettings, wan

METHODS = {"error_free": error_free, "wan": wan}

__all__ = ["METHODS", "ErrorFree", "WanSettings", "error_free", "wan"]
