"""Training, validation and test cells: by cell, or by whole data sets."""
