"""``python -m service.cli``: the same as ``imcnet``, for child processes."""

from service.cli import main

if __name__ == "__main__":
    main()
