# Boots this machine's Debian once more, in namespaces that unshare made: systemd with a
# journal, logind and root's user manager. What is written below /root is gone afterwards.
mount --make-rprivate /
mount -t proc proc /proc
umount -R -l /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
for folder in /run /etc/systemd/system /var/lib/systemd /usr/lib/systemd/system/*.wants
do mount -t tmpfs none "$folder"; done
mkdir /run/written /run/work
mount -t overlay none -o lowerdir=/root,upperdir=/run/written,workdir=/run/work /root
cd /etc/systemd/system
echo '[Unit]' >sysinit.target
echo '[Unit]
Requires=systemd-journald.service systemd-logind.service user@0.service' >default.target
ip link set lo up
exec env -i PATH="$PATH" container=test /lib/systemd/systemd --system
