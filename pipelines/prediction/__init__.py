"""What a run will take, before it runs.

rates    how long a unit of work takes, from earlier artifacts or from the peak of the hardware
predict  seconds, hours, bytes and money of each stage and of the whole run
show     a prediction in the terminal and as JSON
"""
