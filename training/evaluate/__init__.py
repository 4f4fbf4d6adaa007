"""`python -m training.evaluate`: pictures of people by several rows of settings, and how good each row is."""
