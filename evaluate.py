"""Run hisvd.cli.evaluate from the checkout."""

from hisvd.cli.evaluate import main

main()
