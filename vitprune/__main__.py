"""`python -m vitprune`, which is how torchrun and accelerate launch start it."""

from vitprune.cli.app import main

if __name__ == "__main__":
    main()
