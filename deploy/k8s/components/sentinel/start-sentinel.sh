#!/bin/sh
# A sentinel writes what it learns, votes included, into its configuration: it is filled in once and then kept.
set -eu
if [ ! -s /data/sentinel.conf ]; then
    sed -e "s/@PASSWORD@/${REDIS_PASSWORD:?}/" -e "s/@REPLICATION@/${REPLICATION_PASSWORD:?}/" -e "s/@ME@/$POD_NAME.sentinel/" \
        /etc/redis/sentinel.conf > /data/sentinel.new
    mv /data/sentinel.new /data/sentinel.conf
fi
exec redis-server /data/sentinel.conf --sentinel
