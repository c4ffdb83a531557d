from hisvd.cli.calibrate import main

main()
