from slowmo_mpi.cli import main

main()
