from hisvd.cli.compress import main

main()
