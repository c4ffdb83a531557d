"""`python -m hisvd`, the same as the command `hisvd`."""

from hisvd.cli.programs import main

main(prog_name="hisvd")
