"""Every command of ``python -m earlyexit``: what it does, beside the options that it takes."""
