from hisvd.cli.evaluate import main

main()
