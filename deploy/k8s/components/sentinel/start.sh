#!/bin/sh
# Fills in the access list, then becomes Redis: a replica of whom the sentinels call master. While no sentinel answers, the first
# pod is the master; should another have been it, the sentinels turn this one into a replica, and nobody writes to it before,
# because clients ask the sentinels too.
set -eu
me=$POD_NAME.redis
password=$(printf %s "${REDIS_PASSWORD:?}" | sha256sum | cut -d ' ' -f 1)
replication=$(printf %s "${REPLICATION_PASSWORD:?}" | sha256sum | cut -d ' ' -f 1)
sed -e "s/@PASSWORD@/#$password/" -e "s/@REPLICATION@/#$replication/" /etc/redis/users.acl > /run/redis/users.acl
# Sentinels have it written anew when they move the master.
{ cat /etc/redis/redis.conf; echo "masterauth $REPLICATION_PASSWORD"; echo "replica-announce-ip $me"; } > /run/redis/redis.conf

export REDISCLI_AUTH=$REDIS_PASSWORD
master=
for sentinel in sentinel-0.sentinel sentinel-1.sentinel sentinel-2.sentinel; do
    master=$(timeout 2 redis-cli -h "$sentinel" -p 26379 --raw sentinel get-master-addr-by-name millrace 2>/dev/null | head -n 1) || true
    [ -z "$master" ] || break
done
master=${master:-redis-0.redis}
[ "$master" = "$me" ] || echo "replicaof $master 6379" >> /run/redis/redis.conf
exec redis-server /run/redis/redis.conf
