"""Generation: the engine interface, and the engines behind it."""
