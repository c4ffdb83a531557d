"""Run hisvd.cli.calibrate from the checkout."""

from hisvd.cli.calibrate import main

main()
