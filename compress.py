"""Run hisvd.cli.compress from the checkout."""

from hisvd.cli.compress import main

main()
