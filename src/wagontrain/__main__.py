"""`python -m wagontrain` is `wagontrain`."""

from wagontrain.cli import main

if __name__ == "__main__":
    main()
