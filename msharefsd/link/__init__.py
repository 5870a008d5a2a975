"""Between the front and a pager: what they say to each other."""
