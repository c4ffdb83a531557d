"""The programs: parse options, call, print."""
