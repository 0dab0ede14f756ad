"""`megadpo inspect`: what the trainer will really see of a data set, and what is odd about it."""
