"""The three programs: parse options, call, print."""
