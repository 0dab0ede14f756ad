"""One file a command of ``megadpo``: `add_arguments(parser)` says what it takes, `run(arguments, argv)` does it.

A command's file is imported for every call of ``megadpo``, so it imports no torch: what does the work is imported in `run`.
`cli.py` lists the commands.
"""
