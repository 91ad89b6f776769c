"""What tests run against: servers, clusters and a browser.

s3_server, localstack_server     S3 over HTTP
mlflow_server, mlflow_database   MLflow, and what its database holds
ray_nodes, workers               a Ray cluster of several nodes; worker processes of the tests' own
dataset_hub, https_server        servers that files are fetched from
chromium, html_page              a browser, and pages
json_replies, free_ports         answers in JSON; ports for servers
listeners                        who listens where while a command runs
gs_plugin/                       a package for addresses at gs://
"""
