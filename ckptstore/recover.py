"""`python -m ckptstore.recover …`: the command line, also installed as `ckptstore`."""

from ckptstore.cli import main

if __name__ == "__main__":
    main()
