"""softmax(QK)V, one module per way of computing it."""
