"""The work around the method: stages on Ray, their artifacts, tracking, and the `enat` command.

Folders in the order of imports, each of which imports only those below it: cli; doctor and notebook; jobs and reevaluation; run;
stages; evaluation and comparison; training and sampling; data and registry; workflow; artifacts and tracking; storage and cluster;
formatting. guide/ has a page for each task.
"""
