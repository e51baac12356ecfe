"""What a long run needs and the method does not: settings, saves, logs, processes, a plan of its cost."""
