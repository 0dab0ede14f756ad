"""`megadpo doctor`: whether this machine, and the run of a configuration, have what they need; each lack with its fix."""
