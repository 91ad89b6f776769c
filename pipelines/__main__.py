"""`python -m pipelines`: the command of the current folder, even if another version is installed. Cluster jobs use it."""

from pipelines.cli.main import main

if __name__ == "__main__":
    main()
