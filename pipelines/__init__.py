"""The work around the method: stages on Ray, their artifacts, tracking, and the `enat` command.

Folders in the order of imports, each of which imports only those below it: cli; doctor and notebook; jobs, reevaluation and
sharing; run; stages; evaluation, comparison and search; training and sampling; data, registry and prediction; workflow; artifacts
and tracking; storage and cluster; formatting and pages. guide/ has a page for each task.
"""
