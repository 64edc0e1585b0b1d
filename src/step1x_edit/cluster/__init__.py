"""Where edits run if one machine is not enough: replicas of the engine in a cluster of Ray."""
