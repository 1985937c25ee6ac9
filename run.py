"""The whole job from a config: python run.py --help"""

from matquant.cli import main

if __name__ == "__main__":
    main()
