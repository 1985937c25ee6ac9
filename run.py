"""Run one job, or a sweep, from a composed config; ``python run.py --help`` lists the settings."""

from matquant.entry import main

if __name__ == "__main__":
    main()
