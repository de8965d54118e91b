"""The console: a page in the browser that shows what a deployment does, and lets an operator act on it."""
