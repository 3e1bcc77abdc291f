"""The page: a server over runs and models, on this machine alone unless it is told otherwise."""
