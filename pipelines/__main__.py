"""`python -m pipelines`: the command of the folder one is in, whatever version is installed. Jobs on a cluster start so."""

from pipelines.cli.main import main

if __name__ == "__main__":
    main()
