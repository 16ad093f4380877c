"""What the commands do: sparsify, sweep, compare, push."""
