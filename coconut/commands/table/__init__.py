"""``coconut table``: methods of the field trained and evaluated alike, in one table."""
