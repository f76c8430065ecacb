"""softmax(QK)V: the choice of code for it, and that code."""
