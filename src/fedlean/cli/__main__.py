"""`python -m fedlean.cli`."""

from fedlean.cli import main

if __name__ == "__main__":
    main()
