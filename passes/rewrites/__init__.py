"""The passes that change a graph."""
