"""Compile a run ahead of time for devices that need not be here: does it fit, what does it move, how long at best."""
