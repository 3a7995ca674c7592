"""From a plan to its digest, to a running guest, and to the log of both."""
