"""``python -m dist_lora`` is ``dist-lora``."""

from dist_lora.cli import main

if __name__ == "__main__":
    main()
