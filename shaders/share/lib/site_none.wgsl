// No sharing kind: the right operand is a tensor.
